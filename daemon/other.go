//go:build !linux

package daemon

import (
	"context"
	"io"
	"net"
	"os"
	"runtime"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
)

var errUnsupported = &api.Error{Code: api.CodeUnsupported, Message: "culvertd does not support " + runtime.GOOS + " yet"}

func supported() error { return errUnsupported }

type guard struct{}

func startGuard(Config) (*guard, error) { return nil, errUnsupported }
func (*guard) dismiss()                 {}

// Guard is not supported on this system yet.
func (d *Daemon) Guard(context.Context, io.Reader) error { return errUnsupported }

func lock(context.Context, string, time.Duration) (func(), error) { return nil, errUnsupported }

type process struct {
	pid  int
	link *link.Conn
	gone chan struct{}
}

func (v *supervisor) startProcess(*session) (*process, error) { return nil, errUnsupported }
func (*process) serve() error                                 { return errUnsupported }
func (*process) kill()                                        {}
func (*process) howEnded(err error) string                    { return exitText(err) }
func exitText(err error) string                               { return err.Error() }

func checkBinary(string) (string, error) { return "", errUnsupported }

func onlyRoots(os.FileInfo) string { return errUnsupported.Message }

func listen(string, int) (net.Listener, error) { return nil, errUnsupported }

func closeOnExec() {}

func withCaller(ctx context.Context, _ net.Conn) context.Context { return ctx }

var errRootSession = errUnsupported

func unidentified(err error) error { return err }
