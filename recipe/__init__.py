"""Complete jobs built on the public interface of `transfer_queue`."""
