//! kernels/reference
