"""Other ways to move the same batches between two processes of one host, measured in turn with ours."""
