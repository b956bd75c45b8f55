"""What a run tells of itself: the display, metrics, pictures and pages."""
