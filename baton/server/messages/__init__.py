"""Anthropic's Messages API (/v1/messages), translated to chats and back."""
