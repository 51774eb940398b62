"""The API server process: where requests go, and who sends the calls of a switch."""
