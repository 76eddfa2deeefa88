"""How long a test waits for what must happen before it calls it hung: timings decide no test, machines are busy."""

PATIENCE_S = 480.0
