"""What does a bundle contain, and is it complete and authentic?"""
