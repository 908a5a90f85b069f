"""The demo: search sample images, ask about one, draw a contact sheet, serve a web page."""
