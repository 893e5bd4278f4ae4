"""What people look at: progress, charts, trackers, reports."""
