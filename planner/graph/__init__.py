"""The language every room speaks: values, ops, schedules, the simulator, plans."""
