package daemon

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"unicode"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
)

type addressPrefix = netip.Prefix

// maxText bounds any one string that a session shows to users, in bytes.
const maxText = 4 << 10

// handlers registers what a session process may ask. All of it is untrusted.
func (s *session) handlers(conn *link.Conn) {
	conn.Handle(link.MethodHello, func(context.Context, json.RawMessage, []*os.File) (any, []*os.File, error) {
		return s.hello(), nil, nil
	})
	conn.Handle(link.MethodExclude, func(ctx context.Context, params json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		var x link.Exclude
		if err := decode(link.MethodExclude, params, &x); err != nil {
			return nil, nil, err
		}
		s.asking.Lock()
		defer s.asking.Unlock()
		return nil, nil, s.sup.machine.exclude(s, x.Addrs)
	})
	conn.Handle(link.MethodConfigure, func(ctx context.Context, params json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		var n link.Network
		if err := decode(link.MethodConfigure, params, &n); err != nil {
			return nil, nil, err
		}
		s.asking.Lock()
		defer s.asking.Unlock()
		granted, files, err := s.sup.machine.configure(ctx, s, n)
		if err != nil {
			return nil, nil, err
		}
		return granted, files, nil
	})
	conn.Handle(link.MethodRemember, func(_ context.Context, params json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		if len(params) > link.MaxRemember {
			return nil, nil, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("a session may have %d bytes remembered, not %d", link.MaxRemember, len(params))}
		}
		s.update(func() { s.remembered = slices.Clone(params) })
		return nil, nil, nil
	})
	conn.Handle(link.MethodSessions, func(context.Context, json.RawMessage, []*os.File) (any, []*os.File, error) {
		ids := []string{}
		for _, one := range s.sup.selected(caller{UID: s.account.UID}, "", "") {
			ids = append(ids, one.id)
		}
		return ids, nil, nil
	})
	conn.Handle(link.MethodRedial, func(context.Context, json.RawMessage, []*os.File) (any, []*os.File, error) {
		s.sup.machine.redial(s)
		return nil, nil, nil
	})
	s.interceptHandlers(conn)
	conn.Handle(link.MethodStatus, func(_ context.Context, params json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		var r api.Session
		if err := decode(link.MethodStatus, params, &r); err != nil {
			return nil, nil, err
		}
		s.report(r)
		return nil, nil, nil
	})
}

// hello is what a new process is told first.
func (s *session) hello() link.Start {
	network, granted := s.sup.machine.kept(s.id)
	start := link.Start{
		ID:         s.id,
		UID:        s.account.UID,
		Origin:     origin(s.sup.cfg, s.account.UID),
		Options:    s.options,
		Revert:     s.revert,
		Network:    network,
		Granted:    granted,
		MachineDNS: s.sup.machine.machineDNS(s.id, s.options.DNS),
	}
	s.update(func() {
		start.Restart, start.Remembered = s.restarts, s.remembered
		s.siblingsChanged = true
	})
	return start
}

// machineID is machine-id(5), which must not leave the machine as it is.
const machineID = "/etc/machine-id"

// origin makes link.Start.Origin: a keyed hash of who asks where, as
// machine-id(5) wants it. Two daemons of one machine have different sockets.
func origin(cfg Config, uid int) string {
	id, err := os.ReadFile(machineID)
	if err != nil || len(bytes.TrimSpace(id)) == 0 {
		return ""
	}
	h := hmac.New(sha256.New, bytes.TrimSpace(id))
	fmt.Fprintf(h, "culvert %d\n%s\n%s", uid, cfg.Socket, cfg.StateDir)
	return hex.EncodeToString(h.Sum(nil)[:8])
}

func decode(method string, params json.RawMessage, into any) error {
	if err := json.Unmarshal(params, into); err != nil {
		return &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("parameters of %s: %v", method, err)}
	}
	return nil
}

// clean bounds what a session says of itself and takes control characters out:
// it ends on somebody's terminal, perhaps root's.
func clean(r *api.Session) {
	for _, text := range []*string{
		&r.Context, &r.Server, &r.Cluster, &r.Namespace, &r.Step, &r.Cause,
		&r.Agent.Namespace, &r.Agent.Pod, &r.Agent.Node, &r.Agent.Image, &r.Agent.Version, &r.Carrier.Name,
	} {
		*text = cleanText(*text)
	}
	if r.Error != nil {
		r.Error = cleanError(r.Error)
	}
	if len(r.Notes) > 64 {
		r.Notes = r.Notes[:64]
	}
	for i := range r.Notes {
		r.Notes[i] = cleanText(r.Notes[i])
	}
}

func cleanError(e *api.Error) *api.Error {
	return &api.Error{Code: cleanText(e.Code), Message: cleanText(e.Message), Hint: cleanText(e.Hint)}
}

func cleanText(text string) string {
	if len(text) > maxText {
		text = text[:maxText]
	}
	return strings.Map(func(c rune) rune {
		if c == '\n' || c == '\t' || unicode.IsPrint(c) {
			return c
		}
		return -1
	}, text)
}

// asAPI keeps an error's code and hint if it has them.
func asAPI(err error) *api.Error {
	var e *api.Error
	if errors.As(err, &e) {
		return e
	}
	return &api.Error{Code: api.CodeInternal, Message: err.Error()}
}
