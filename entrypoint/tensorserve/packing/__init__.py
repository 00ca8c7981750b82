"""How is a bundle made (`tensorserve pack`) and signed (`tensorserve sign`), and its key wrapped
(`rewrap`), and exchanged (`rekey`)?"""
