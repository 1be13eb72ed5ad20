//go:build unix

package api

import (
	"errors"
	"syscall"
)

// refused: the socket is there and nobody listens.
func refused(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }
