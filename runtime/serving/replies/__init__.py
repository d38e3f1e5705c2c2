"""The answers of the model as the responses of OpenAI's endpoints."""
