//go:build !linux

package tun

import (
	"os"
	"runtime"
)

func unsupported() error {
	return fail("Culvert has no TUN device for "+runtime.GOOS+" yet", "run it on Linux or in a Linux virtual machine")
}

// Create makes the device. Only Linux has one.
func Create(Config) (*os.File, error) { return nil, unsupported() }

// Available says why Create could not work.
func Available() error { return unsupported() }

// Delete deletes the TUN device of that name.
func Delete(string) error { return unsupported() }

// Device is a passed TUN descriptor.
type Device struct{}

// Open wraps a descriptor made by Create.
func Open(*os.File) (*Device, error) { return nil, unsupported() }

// Name is the interface's name.
func (d *Device) Name() string { return "" }

// File is the descriptor.
func (d *Device) File() *os.File { return nil }

// ReadBatch reads packets with their virtio headers.
func (d *Device) ReadBatch([][]byte, []int, int, bool) (int, error) { return 0, unsupported() }

// Write writes one packet with its virtio header.
func (d *Device) Write([]byte) (int, error) { return 0, unsupported() }

// Wake makes a blocked ReadBatch return ErrWoken.
func (d *Device) Wake() {}

// Close closes the descriptor.
func (d *Device) Close() error { return nil }
