//go:build !linux

package cluster

import "syscall"

func socketOptions(_, _ string, _ syscall.RawConn) error { return nil }
