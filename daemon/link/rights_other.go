//go:build !unix

package link

import (
	"errors"
	"os"
)

const sessionFiles = 0

var errNoRights = errors.New("passing descriptors is not supported on this system yet")

// Pair makes a connected link; not supported on this system yet.
func Pair() (*Conn, *os.File, error) { return nil, nil, errNoRights }

// FromDaemon returns the session's end of the link; not supported on this
// system yet.
func FromDaemon() (*Conn, error) { return nil, errNotStarted }

func rightsSpace(int) int { return 0 }

func receiveRights([]byte) ([]*os.File, error) { return nil, errNoRights }

func withRights(files []*os.File, f func(oob []byte) error) error {
	if len(files) > 0 {
		return errNoRights
	}
	return f(nil)
}
