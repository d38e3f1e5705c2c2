"""Requests of OpenAI's API: read, checked, and what they ask for."""
