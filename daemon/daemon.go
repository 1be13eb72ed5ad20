// Package daemon is culvertd: the root half of Culvert. It answers the API on a
// Unix socket (daemon/api), runs one session process per connected cluster as
// the calling user (daemon/link), and owns what only root may change on the
// machine: TUN devices, routes and DNS settings. It reads no kubeconfig, talks
// to no network and parses no packet.
package daemon

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"runtime/pprof"
	"strconv"
	"time"

	"github.com/culvert-dev/culvert/internal/version"
)

const (
	// shutdownLimit is when a daemon that does not come to its end says where it
	// hangs and goes; systemd's unit waits longer.
	shutdownLimit = 20 * time.Second
	// lockWait is for a guard or a cleanup that is just finishing; cleanupWait
	// for a guard or a daemon, guardWait for a dying daemon.
	lockWait    = 5 * time.Second
	cleanupWait = 2 * time.Second
	guardWait   = time.Second
)

// Daemon is the daemon. New has no side effect; Run does it all.
type Daemon struct{ cfg Config }

// New makes a daemon.
func New(cfg Config) *Daemon { return &Daemon{cfg: cfg.complete()} }

// Run serves until ctx ends, then disconnects all sessions and leaves the
// machine as it was. It takes away first what a dead daemon left.
func (d *Daemon) Run(ctx context.Context) error {
	if err := supported(); err != nil {
		return err
	}
	closeOnExec()
	log := d.cfg.Log
	unlock, err := lock(ctx, d.cfg.Socket, lockWait)
	if err != nil {
		return err
	}
	defer unlock()
	if err := d.clean(ctx); err != nil {
		log.Error("removing what a dead daemon left", "error", err)
	}
	gid := d.group()
	l, err := listen(d.cfg.Socket, gid)
	if err != nil {
		return err
	}
	sup := newSupervisor(d.cfg, gid)
	// Requests outlive ctx until the sessions have ended: who disconnects or
	// watches sees the end.
	srv := newServer(context.WithoutCancel(ctx), d.cfg, sup, withCaller)
	served := make(chan error, 1)
	go func() { served <- srv.serve(l) }()
	watched := make(chan struct{})
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	go func() {
		defer close(watched)
		sup.machine.watch(watching)
	}()
	running, stopRunning := context.WithCancel(ctx)
	sup.revert(running)
	sup.resume(running)
	log.Info("culvertd is ready", "version", version.Version, "socket", d.cfg.Socket, "gid", gid, "session", d.cfg.SessionBinary)
	notify("READY=1\nSTATUS=" + sup.summary())
	go sup.notifyStatus(running)

	select {
	case <-ctx.Done():
		err = nil
	case err = <-served:
		served <- nil
	}
	log.Info("culvertd is ending")
	notify("STOPPING=1")
	watchdog := time.AfterFunc(shutdownLimit, func() {
		fmt.Fprintln(os.Stderr, "culvertd does not come to its end; where it hangs:")
		pprof.Lookup("goroutine").WriteTo(os.Stderr, 2)
		os.Exit(1)
	})
	defer watchdog.Stop()
	stopRunning()
	sup.stop()
	stopWatching()
	<-watched
	srv.shutdown(time.Second)
	<-served
	return err
}

// clean removes what is left of a dead daemon's sessions.
func (d *Daemon) clean(ctx context.Context) error {
	removed, err := d.cfg.Router.Cleanup(ctx)
	for _, what := range removed {
		d.cfg.Log.Warn("removed what a dead daemon left", "what", what)
	}
	return err
}

// Cleanup removes from the machine what a dead daemon left: DNS settings,
// devices, routes, rules. While a daemon lives it changes nothing and returns
// an error.
func (d *Daemon) Cleanup(ctx context.Context) (removed []string, err error) {
	if err := supported(); err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, d.cfg.Socket, cleanupWait)
	if err != nil {
		return nil, err
	}
	defer unlock()
	return d.cfg.Router.Cleanup(ctx)
}

// group finds the group that may use the daemon; -1 is root only.
func (d *Daemon) group() int {
	g, err := user.LookupGroup(d.cfg.Group)
	if err == nil {
		if gid, err := strconv.Atoi(g.Gid); err == nil {
			return gid
		}
	}
	d.cfg.Log.Warn("only root may use culvertd: there is no such group", "group", d.cfg.Group, "mend", "sudo groupadd --system "+d.cfg.Group+" && sudo systemctl restart culvertd")
	return -1
}
