package router

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// poll is how often /etc/resolv.conf is looked at while it is ours: two
	// lstat calls, which see bind mounts and link targets too (inotify does not).
	poll = time.Second

	// tramples bounds how often we take the file back: against a manager that
	// writes it again at once, once per calm.
	tramples = 5
	calm     = 30 * time.Second
)

// resolvConf owns /etc/resolv.conf while there are sessions.
type resolvConf struct {
	file    confFile
	log     *slog.Logger
	changed func() // the machine's nameservers are others now

	mu      sync.Mutex
	active  bool
	server  netip.Addr
	search  []string
	seen    [2]stamp           // of the file and of its original, at the last look
	stop    context.CancelFunc // of watch
	done    chan struct{}
	closed  bool
	tokens  *bucket
	notTill time.Time // no taking back before
}

func (r *resolvConf) set(ctx context.Context, sessions []SessionDNS) error {
	if len(sessions) == 0 {
		return r.release(false)
	}
	server := sessions[0].Server
	if server.Port() != 53 {
		return fmt.Errorf("%s: resolv.conf knows no port but 53", server)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return errors.New("already closed")
	}
	r.server, r.search = server.Addr(), nil
	for _, s := range sessions {
		for _, n := range s.Search {
			if n = strings.ToLower(strings.Trim(n, ".")); n != "" && !slices.Contains(r.search, n) {
				r.search = append(r.search, n)
			}
		}
	}
	if err := r.takeLocked(); err != nil {
		return err
	}
	if !r.active {
		r.active = true
		r.tokens = newBucket(tramples, calm)
		var watchCtx context.Context
		watchCtx, r.stop = context.WithCancel(context.Background())
		r.done = make(chan struct{})
		go r.watch(watchCtx, r.done)
	}
	return nil
}

// takeLocked makes the file ours and current; whatever it is now, unless it is
// ours or made of ours, is the original from now on.
func (r *resolvConf) takeLocked() error {
	content, err := r.file.read()
	if err != nil {
		return fmt.Errorf("reading %s: %w", r.file.path, err)
	}
	if !isOurs(content) && (!r.active || !derived(content)) {
		if err := r.file.save(); err != nil {
			return err
		}
		defer r.changed()
	}
	if want := r.renderLocked(); !bytes.Equal(content, want) {
		if err := r.file.write(want); err != nil {
			return err
		}
	}
	r.seen = r.file.stamps()
	if now, err := r.file.read(); err != nil || !bytes.Equal(now, r.renderLocked()) {
		r.seen = [2]stamp{} // somebody was faster than the stamps: look again
	}
	return nil
}

// derived tells that somebody edited our file rather than replaced it, or
// removed it: then the original that we have is still the machine's.
func derived(content []byte) bool {
	if len(bytes.TrimSpace(content)) == 0 {
		return true
	}
	for line := range strings.Lines(string(content)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "nameserver" {
			if a, err := netip.ParseAddr(f[1]); err == nil && loopbacks.Contains(a) {
				return true
			}
		}
	}
	return false
}

// renderLocked makes our content from the original as it is now.
func (r *resolvConf) renderLocked() []byte {
	c := parseResolvConf(r.file.original())
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s: its names are answered here, all others by\n", mark)
	fmt.Fprintf(&b, "# the nameservers of before. Changes are lost. To get the original back (it is in\n")
	fmt.Fprintf(&b, "# %s): culvert disconnect, or as root culvertd cleanup\n", r.file.saved)
	for _, s := range c.servers {
		fmt.Fprintf(&b, "%snameserver %s\n", before, s)
	}
	if len(c.search) > 0 {
		fmt.Fprintf(&b, "%ssearch %s\n", before, strings.Join(c.search, " "))
	}
	for _, line := range c.other {
		fmt.Fprintf(&b, "%s%s\n", before, line)
	}
	fmt.Fprintf(&b, "nameserver %s\n", r.server)
	search := slices.Clone(c.search) // first: the machine's own short names stay what they are
	for _, n := range r.search {
		if !slices.Contains(search, n) {
			search = append(search, n)
		}
	}
	if len(search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(search, " "))
	}
	for _, line := range c.other {
		fmt.Fprintf(&b, "%s\n", line)
	}
	return b.Bytes()
}

// watch takes the file back when somebody else wrote it, and follows the
// original where that is a link to a file which its manager rewrites.
func (r *resolvConf) watch(ctx context.Context, done chan struct{}) {
	defer close(done)
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			r.look()
		}
	}
}

func (r *resolvConf) look() {
	if !r.stale() {
		return
	}
	// Half-written files are common here (truncate, then write): let it settle.
	time.Sleep(settle)
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.active {
		return
	}
	now := r.file.stamps()
	if now[0] != r.seen[0] {
		r.log.Warn("resolv.conf was changed by another program, taking it back", "path", r.file.path)
		r.notTill = time.Now().Add(r.tokens.take(time.Now()))
	}
	if now[1] != r.seen[1] {
		defer r.changed()
	}
	if err := r.takeLocked(); err != nil {
		r.log.Warn("resolv.conf not taken back", "path", r.file.path, "err", err)
		r.notTill = time.Now().Add(calm)
	}
}

// stale tells whether there is something to do, and it may be done now.
func (r *resolvConf) stale() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.active && r.file.stamps() != r.seen && !time.Now().Before(r.notTill)
}

// release puts the original back and waits for watch.
func (r *resolvConf) release(last bool) error {
	r.mu.Lock()
	r.closed = r.closed || last
	if !r.active {
		r.mu.Unlock()
		return nil
	}
	r.active = false
	stop, done := r.stop, r.done
	r.mu.Unlock()
	stop()
	<-done
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.active {
		return nil // taken again meanwhile
	}
	if _, err := r.file.restore(); err != nil {
		return err
	}
	return nil
}

func (r *resolvConf) close(context.Context) error { return r.release(true) }

// stamp tells versions of a file apart.
type stamp struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
	mode         uint32
	missing      bool
}

// stamps are those of the file itself and of what its original leads to.
func (f confFile) stamps() [2]stamp {
	orig := f.saved
	if target, err := os.Readlink(f.saved); err == nil {
		orig = target
		if !strings.HasPrefix(target, "/") {
			orig = f.path[:strings.LastIndexByte(f.path, '/')+1] + target
		}
	}
	var res [2]stamp
	for i, stat := range []func(*syscall.Stat_t) error{
		func(st *syscall.Stat_t) error { return syscall.Lstat(f.path, st) },
		func(st *syscall.Stat_t) error { return syscall.Stat(orig, st) },
	} {
		var st syscall.Stat_t
		if stat(&st) != nil {
			res[i].missing = true
			continue
		}
		res[i] = stamp{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim, mode: st.Mode}
	}
	return res
}
