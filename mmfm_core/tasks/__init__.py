"""What each task is judged by."""
