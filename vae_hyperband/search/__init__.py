"""What a search decides: functions of its decision log, without Ray."""
