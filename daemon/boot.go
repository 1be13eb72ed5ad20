package daemon

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
)

// A session at boot is tried again after minBootDelay, doubled up to
// maxBootDelay: the network, the user's home or the VPN may not be there yet.
const (
	minBootDelay = time.Second
	maxBootDelay = time.Minute
	maxRecords   = 256 // per machine
	maxOwn       = 16  // per user, so that one leaves room for the others
)

// bootRecord is what is kept of a session that shall be connected at boot: no
// environment and no credential.
type bootRecord struct {
	UID     int         `json:"uid"`
	Options api.Options `json:"options"`
	// ByRoot: root asked for it, for whomever. Else the user must still be in the
	// group when the machine boots.
	ByRoot bool `json:"byRoot,omitempty"`
}

// name identifies what is connected to, so that connecting again replaces the
// record. No word of the user's is in a file's name.
func (r bootRecord) name() string {
	sum := sha256.Sum256([]byte(r.Options.Kubeconfig + "\x00" + r.Options.Context + "\x00" + r.Options.Namespace))
	return fmt.Sprintf("%d-%x.json", r.UID, sum[:8])
}

func newBootStore(dir string) *records[bootRecord] {
	return &records[bootRecord]{dir: filepath.Join(dir, "boot"), what: "session at boot", most: maxRecords, own: maxOwn}
}

// resume connects the sessions that shall be there at boot, each until it was
// connected once, its record is removed, or ctx ends.
func (v *supervisor) resume(ctx context.Context) {
	records, err := v.boot.list()
	if err != nil {
		v.log.Error("reading the sessions at boot", "error", err)
	}
	for _, r := range records {
		v.wg.Go(func() { v.resumeOne(ctx, r) })
	}
}

func (v *supervisor) resumeOne(ctx context.Context, r bootRecord) {
	log := v.log.With("uid", r.UID, "context", r.Options.Context)
	for delay := minBootDelay; ctx.Err() == nil && v.boot.has(r); delay = min(2*delay, maxBootDelay) {
		err := v.connectAtBoot(ctx, r)
		if err == nil {
			return
		}
		log.Warn("connecting at boot: will try again", "in", delay, "error", err)
		sleep(ctx, delay)
	}
}

// connectAtBoot returns nil once the session is connected.
func (v *supervisor) connectAtBoot(ctx context.Context, r bootRecord) error {
	a, err := lookup(r.UID)
	if err == nil {
		a, err = a.withGroups()
	}
	if err != nil {
		return err
	}
	if !r.ByRoot && !(caller{GID: a.GID, Groups: a.Groups}).in(v.gid) {
		return &api.Error{Code: api.CodeDenied, Message: fmt.Sprintf("uid %d is no longer in the group that may use culvertd", r.UID)}
	}
	s, err := v.newSession(a, api.ConnectRequest{Options: r.Options, AtBoot: true}, bootEnv(a), r.ByRoot, "")
	if err != nil {
		return err
	}
	w := v.watch(func(e *api.Session) bool { return e.ID == s.id })
	defer v.unwatch(w)
	v.start(s)
	for {
		events := w.next(ctx)
		if events == nil {
			return ctx.Err()
		}
		for _, e := range events {
			switch {
			case e.State == api.Connected:
				return nil
			case e.State == api.Disconnected && e.Error != nil:
				return e.Error
			case e.State == api.Disconnected:
				return errors.New("disconnected")
			}
		}
	}
}

// forgetBoot removes the records that a caller's disconnect means.
func (v *supervisor) forgetBoot(c caller, match func(bootRecord) bool) (removed int) {
	records, _ := v.boot.list()
	for _, r := range records {
		if !c.mayUse(r.UID) || !match(r) {
			continue
		}
		if err := v.boot.remove(r); err != nil {
			v.log.Error("forgetting a session at boot", "error", err)
			continue
		}
		removed++
	}
	return removed
}
