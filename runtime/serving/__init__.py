"""One model for many callers: requests as JSON, answered one after the other."""
