"""The web page: chat with any saved model, look inside it, and compare two of them. `page.py` puts it together."""
