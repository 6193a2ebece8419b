"""Other engines and kernels, and how they take turns with ours."""
