package main

type lab struct{}

func newLab() (*lab, error)    { return nil, nil }
func (l *lab) close(keep bool) {}
