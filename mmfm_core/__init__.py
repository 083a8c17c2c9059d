"""The part of mmfm that knows models, data and training, but no network and no command line."""
