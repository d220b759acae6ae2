"""What crosses process boundaries: message types, their encoding, channels, the server loop, the proof of the token."""
