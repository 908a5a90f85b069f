"""Request and response bodies of every API that the server speaks, as pydantic models."""
