"""OpenAI's Responses API (/v1/responses), translated to chats and back."""
