// Package tun makes the TUN device and reads and writes the kernel's packets on
// it: TCP super-packets of up to 64 KiB with unfinished checksums, described by
// a virtio header, as well as ordinary ones. The root daemon creates devices, a
// session opens the descriptor that it was passed.
package tun

import (
	"errors"

	"github.com/culvert-dev/culvert/daemon/api"
)

// Config names the device to make.
type Config struct {
	Name string // at most 15 bytes
	MTU  int    // of inner packets
}

const (
	// gsoMaxSize bounds the kernel's super-packets: a WireGuard message may hold
	// 65,503 bytes, and the buffers' ends are used for accounts.
	gsoMaxSize = 65000
	// queueLen is the device's ring in packets, which drops when full. The default
	// of 500 holds 32 MB of super-packets: seconds on any line. 128 hold a burst of
	// small packets and at most 8 MB.
	queueLen = 128
)

func fail(message, hint string) error {
	return &api.Error{Code: api.CodeTUN, Message: message, Hint: hint}
}

// ErrWoken is returned by Device.ReadBatch after Device.Wake.
var ErrWoken = errors.New("woken")
