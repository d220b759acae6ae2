"""Where the servers of a session live: in this process, or in Ray actors."""
