"""From a site's manifest to batches with presence masks."""
