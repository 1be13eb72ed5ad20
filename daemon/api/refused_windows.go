package api

import (
	"errors"

	"golang.org/x/sys/windows"
)

// refused: the socket is there and nobody listens.
func refused(err error) bool { return errors.Is(err, windows.WSAECONNREFUSED) }
