"""What the server and the web page have in common: who may connect, and as whom."""
