"""The backend of compiled C++: csrc/cpu."""
