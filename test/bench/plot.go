package main

func (r *report) plot(file string) error { return nil }
