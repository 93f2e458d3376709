"""fastis in other libraries' trainers: one module each, imported when asked for."""
