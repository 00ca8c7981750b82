"""How is a chunk sealed and opened (XSalsa20-Poly1305), and how are keys derived?"""
