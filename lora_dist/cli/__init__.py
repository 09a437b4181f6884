"""The door: command line -> RunConfig -> processes."""
