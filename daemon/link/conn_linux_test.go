package link

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"golang.org/x/sys/unix"
)

// ends makes both ends of a link, running until the test ends.
func ends(t *testing.T, setup func(daemon, session *Conn)) (daemon, session *Conn) {
	t.Helper()
	daemon, file, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	sock, err := unixConn(file)
	if err != nil {
		t.Fatal(err)
	}
	session = New(sock, sessionFiles)
	if setup != nil {
		setup(daemon, session)
	}
	var wg sync.WaitGroup
	wg.Go(func() { daemon.Run(context.Background()) })
	wg.Go(func() { session.Run(context.Background()) })
	t.Cleanup(func() {
		daemon.Close()
		session.Close()
		wg.Wait()
	})
	return daemon, session
}

func openCount(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func TestCallBothWays(t *testing.T) {
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	defer write.Close()
	var daemon, session *Conn
	daemon, session = ends(t, func(d, s *Conn) {
		d.Handle(MethodConfigure, func(ctx context.Context, params json.RawMessage, _ []*os.File) (any, []*os.File, error) {
			// It may call back while it serves.
			var back string
			if _, err := d.Call(ctx, MethodPing, "x", &back); err != nil {
				return nil, nil, err
			}
			return back + string(params), []*os.File{write, write}, nil
		})
		d.Handle(MethodExclude, func(context.Context, json.RawMessage, []*os.File) (any, []*os.File, error) {
			return nil, []*os.File{write}, fmt.Errorf("excluding: %w", &api.Error{Code: api.CodeConflict, Message: "m", Hint: "h"})
		})
		s.Handle(MethodPing, func(context.Context, json.RawMessage, []*os.File) (any, []*os.File, error) { return "pong", nil, nil })
	})
	_ = daemon
	before := openCount(t)
	var out string
	files, err := session.Call(t.Context(), MethodConfigure, 7, &out)
	if err != nil || out != "pong7" || len(files) != 2 {
		t.Fatalf("got %q, %d files, %v", out, len(files), err)
	}
	for _, f := range files {
		if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("a received descriptor is not close-on-exec: %v", err)
		}
		f.WriteString("x")
		f.Close()
	}
	buf := make([]byte, 2)
	if n, err := io.ReadFull(read, buf); err != nil || string(buf) != "xx" {
		t.Errorf("through the passed descriptors came %q, %v", buf[:n], err)
	}
	_, err = session.Call(t.Context(), MethodExclude, nil, nil)
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeConflict || e.Hint != "h" {
		t.Errorf("an error came as %v", err)
	}
	if _, err = session.Call(t.Context(), "nonsense", nil, nil); !errors.As(err, &e) || e.Code != api.CodeNotFound {
		t.Errorf("unknown method: %v", err)
	}
	if after := openCount(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestNotificationsKeepTheirOrder(t *testing.T) {
	const n = 1000
	got := make(chan int, n)
	_, session := ends(t, func(d, _ *Conn) {
		d.Handle(MethodStatus, func(_ context.Context, params json.RawMessage, _ []*os.File) (any, []*os.File, error) {
			var i int
			json.Unmarshal(params, &i)
			got <- i
			return nil, nil, nil
		})
	})
	for i := range n {
		if err := session.Notify(MethodStatus, i); err != nil {
			t.Fatal(err)
		}
	}
	session.Close() // what was sent before still arrives
	for i := range n {
		select {
		case j := <-got:
			if i != j {
				t.Fatalf("notification %d came as %d", j, i)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("notification %d never came", i)
		}
	}
}

func TestCallsEnd(t *testing.T) {
	release := make(chan struct{})
	daemon, session := ends(t, func(d, _ *Conn) {
		d.Handle(MethodHello, func(ctx context.Context, _ json.RawMessage, _ []*os.File) (any, []*os.File, error) {
			select {
			case <-release:
			case <-ctx.Done():
			}
			return nil, []*os.File{os.Stdin}, nil
		})
	})
	before := openCount(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := session.Call(ctx, MethodHello, nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("out of time: %v", err)
	}
	// The late answer's descriptor is not kept.
	close(release)
	if _, err := session.Call(t.Context(), "x", nil, nil); err == nil {
		t.Error("no answer to x expected")
	}
	if after := openCount(t); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
	if _, err := session.Call(t.Context(), MethodRemember, strings.Repeat("x", MaxMessage), nil); !errors.Is(err, errTooLong) {
		t.Errorf("too long: %v", err)
	}
	result := make(chan error)
	go func() {
		_, err := daemon.Call(t.Context(), "never", nil, nil)
		result <- err
	}()
	<-result // "no such method"
	session.Close()
	if _, err := daemon.Call(t.Context(), "x", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
	<-daemon.Done()
}

func TestTooManyRequests(t *testing.T) {
	release := make(chan struct{})
	var refused, served atomic.Int32
	_, session := ends(t, func(d, _ *Conn) {
		d.Handle(MethodHello, func(context.Context, json.RawMessage, []*os.File) (any, []*os.File, error) {
			<-release
			return nil, nil, nil
		})
	})
	var wg sync.WaitGroup
	for range 3 * maxServing {
		wg.Go(func() {
			if _, err := session.Call(t.Context(), MethodHello, nil, nil); err != nil {
				refused.Add(1)
			} else {
				served.Add(1)
			}
		})
	}
	for deadline := time.Now().Add(5 * time.Second); refused.Load() < 2*maxServing && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	close(release)
	wg.Wait()
	if refused.Load() != 2*maxServing || served.Load() != maxServing {
		t.Errorf("%d refused, %d served", refused.Load(), served.Load())
	}
}

// attack writes raw bytes, with descriptors, to a daemon's end and returns how
// its Run ended.
func attack(t *testing.T, raw []byte, fds ...int) error {
	t.Helper()
	daemon, file, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	daemon.Handle(MethodStatus, func(context.Context, json.RawMessage, []*os.File) (any, []*os.File, error) { return nil, nil, nil })
	peer, err := unixConn(file)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- daemon.Run(t.Context()) }()
	go io.Copy(io.Discard, peer)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	peer.WriteMsgUnix(raw, oob, nil)
	peer.CloseWrite()
	err = <-ended
	peer.Close()
	return err
}

func frame(text string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
}

func TestHostilePeer(t *testing.T) {
	attack(t, frame(`{}`)) // opens what Go opens once
	before := openCount(t)
	for _, x := range []struct {
		name string
		raw  []byte
		want error
	}{
		{"endless length", []byte{0xff, 0xff, 0xff, 0xff, 1}, errTooLong},
		{"one too long", binary.BigEndian.AppendUint32(nil, MaxMessage+1), errTooLong},
		{"empty", []byte{0, 0, 0, 0}, errEmptyMsg},
		{"half a length", []byte{0, 0}, io.ErrUnexpectedEOF},
		{"half a message", frame("{}")[:5], io.ErrUnexpectedEOF},
		{"announced and never sent", binary.BigEndian.AppendUint32(nil, MaxMessage), io.ErrUnexpectedEOF},
	} {
		if err := attack(t, x.raw); !errors.Is(err, x.want) {
			t.Errorf("%s: %v, want %v", x.name, err, x.want)
		}
	}
	if err := attack(t, frame("\xff{")); err == nil {
		t.Error("no JSON is taken")
	}
	if err := attack(t, frame(`{"id":1,"method":"status"}`), 0, 1, 2, 0, 1, 2); err != nil {
		t.Errorf("unwanted descriptors are the kernel's to drop: %v", err)
	}
	if err := attack(t, append(frame(`{"id":77,"result":{}}`), frame(`{"method":"nonsense"}`)...)); err != nil {
		t.Errorf("an answer that nobody waits for: %v", err)
	}
	if after := openCount(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// More descriptors than a session takes end its link and are closed.
func TestTooManyDescriptors(t *testing.T) {
	daemon, file, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	sock, err := unixConn(file)
	if err != nil {
		t.Fatal(err)
	}
	session := New(sock, 1)
	ended := make(chan error)
	go func() { ended <- session.Run(context.Background()) }()
	before := openCount(t)
	f := []*os.File{os.Stdin, os.Stdin}
	// The other end may hang up before all of a message is written.
	if err := daemon.write(message{Method: "x", files: f}); err != nil && !errors.Is(err, unix.EPIPE) {
		t.Fatal(err)
	}
	daemon.write(message{Method: "y", files: f})
	daemon.Close()
	<-ended
	if after := openCount(t); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestFromDaemonRefusesOtherFiles(t *testing.T) {
	if _, err := unixConn(os.NewFile(uintptr(mustOpen(t)), "x")); err == nil {
		t.Error("a file is taken for a socket")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	tcp, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	f, err := tcp.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unixConn(f); err == nil {
		t.Error("a TCP connection is taken for the link")
	}
}

func mustOpen(t *testing.T) int {
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// Whatever a peer sends, the daemon's end neither panics nor hangs.
func FuzzPeer(f *testing.F) {
	f.Add(frame(`{"id":1,"method":"status","params":{}}`))
	f.Add(append(frame(`{"id":1,"result":null}`), 0xff))
	f.Add([]byte{0, 0, 0, 2, '{', '}', 0, 0})
	f.Add(frame(`{"method":"status","error":{"code":"x"}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		done := make(chan struct{})
		go func() { attack(t, raw); close(done) }()
		select {
		case <-done:
		case <-time.After(5 * time.Second):
			t.Fatal("hangs")
		}
	})
}
