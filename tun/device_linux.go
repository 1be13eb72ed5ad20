package tun

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/internal/nonblock"
)

// Device is a passed TUN descriptor, as made by Create, with virtio headers.
// One goroutine may read; Write, Wake and Close may be called from any.
type Device struct {
	f    *os.File
	rc   syscall.RawConn
	out  *nonblock.Writer
	name string

	// State of the one reader, kept here so that reading allocates nothing.
	bufs  [][]byte
	sizes []int
	limit int
	block bool
	n     int
	err   error
	step  func(fd uintptr) bool

	mu    sync.Mutex
	woken bool // the read deadline is in the past
}

// Open wraps a descriptor made by Create in another process. The Device owns f
// from now on, also when Open fails.
func Open(f *os.File) (*Device, error) {
	// A passed descriptor comes wrapped by os.NewFile, which only takes part in
	// polling if it was non-blocking at that moment; so it is wrapped anew.
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	f.Close()
	if err != nil {
		return nil, fmt.Errorf("duplicating the TUN descriptor: %w", err)
	}
	req, err := unix.NewIfreq("")
	if err == nil {
		err = unix.IoctlIfreq(fd, unix.TUNGETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("the passed descriptor is no TUN device: %w", err)
	}
	if flags := req.Uint16(); flags&unix.IFF_VNET_HDR == 0 || flags&unix.IFF_TUN == 0 || flags&unix.IFF_NO_PI == 0 {
		unix.Close(fd)
		return nil, fmt.Errorf("TUN device %s has flags %#x: not made by Create", req.Name(), flags)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("making TUN device %s non-blocking: %w", req.Name(), err)
	}
	d := &Device{f: os.NewFile(uintptr(fd), "tun:"+req.Name()), name: req.Name()}
	if err := d.f.SetReadDeadline(time.Time{}); err != nil {
		d.f.Close()
		return nil, fmt.Errorf("polling TUN device %s: %w", d.name, err)
	}
	if d.rc, err = d.f.SyscallConn(); err != nil {
		d.f.Close()
		return nil, fmt.Errorf("polling TUN device %s: %w", d.name, err)
	}
	d.step = d.readSome
	d.out = nonblock.NewWriter(d.rc)
	return d, nil
}

// Name is the interface's name when it was opened.
func (d *Device) Name() string { return d.name }

// File is the descriptor; the Device still owns it.
func (d *Device) File() *os.File { return d.f }

// ReadBatch reads packets, each with its virtio header before it, one into each
// of bufs until these or limit bytes are full or no more are there, and sets
// sizes, headers included. With block it waits for the first. It returns
// ErrWoken, without packets, when Wake was called before or meanwhile. A packet
// longer than its buffer is truncated by the kernel: let bufs be long enough.
func (d *Device) ReadBatch(bufs [][]byte, sizes []int, limit int, block bool) (int, error) {
	d.mu.Lock()
	if d.woken {
		d.woken = false
		_ = d.f.SetReadDeadline(time.Time{})
		d.mu.Unlock()
		if block {
			return 0, ErrWoken
		}
	} else {
		d.mu.Unlock()
	}
	d.bufs, d.sizes, d.limit, d.block, d.n, d.err = bufs, sizes, limit, block, 0, nil
	err := d.rc.Read(d.step)
	d.bufs, d.sizes = nil, nil
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if block {
			return 0, ErrWoken // the next call takes the deadline away
		}
		return 0, nil
	}
	if err == nil {
		err = d.err
	}
	if d.n > 0 {
		return d.n, nil // the error comes again
	}
	return 0, err
}

// readSome is called by the poller whenever the descriptor may be readable.
func (d *Device) readSome(fd uintptr) bool {
	for total := 0; d.n < len(d.bufs) && total < d.limit; {
		n, err := nonblock.Read(fd, d.bufs[d.n])
		switch {
		case err == nil && n > HeaderLen:
			d.sizes[d.n] = n
			d.n++
			total += n
		case err == nil:
		case err == unix.EAGAIN:
			return d.n > 0 || !d.block
		default:
			d.err = fmt.Errorf("reading TUN device %s: %w", d.name, err)
			return true
		}
	}
	return true
}

// Write writes one packet with its virtio header before it.
func (d *Device) Write(p []byte) (int, error) { return d.out.Write(p) }

// Wake makes the present or else the next blocking ReadBatch return ErrWoken.
func (d *Device) Wake() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.woken {
		d.woken = true
		_ = d.f.SetReadDeadline(time.Unix(1, 0))
	}
}

// Close closes the descriptor and releases a blocked read. Closing the last one
// deletes the device.
func (d *Device) Close() error { return d.f.Close() }
