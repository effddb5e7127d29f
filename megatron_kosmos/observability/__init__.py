"""What a run tells about itself: logs, metrics, progress, timers and counted FLOPs. Never changes what it observes."""
