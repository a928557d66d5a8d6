"""What Python does beside the kernels: state that a forward reads, changes and leaves."""
