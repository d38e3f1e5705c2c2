"""Serve one package to many clients, by OpenAI's API."""
