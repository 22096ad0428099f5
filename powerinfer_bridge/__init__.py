"""Running exported files: the embedded engine, real PowerInfer, and what they measure."""
