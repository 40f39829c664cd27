"""The 3D spatial adapter: SAM's image encoder over volumes, with a decoder of its own."""
