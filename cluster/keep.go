package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// Lost is the end of an intercept that somebody else brought about.
type Lost struct{ Why string }

func (l *Lost) Error() string { return l.Why }

// ResumeSpec names an intercept that another process of the same session began.
type ResumeSpec struct {
	InterceptSpec
	Namespace string
	Key       string
	ID, Token string
}

// ResumeIntercept finds an intercept again. The error is a *Lost when it is not
// there any more, or is somebody else's.
func (c *Cluster) ResumeIntercept(ctx context.Context, r ResumeSpec) (*Intercept, error) {
	state, err := c.GateState(ctx, r.Namespace)
	if err != nil {
		return nil, err
	}
	e, ok := state.Entries[r.Key]
	i := &Intercept{c: c, spec: r.InterceptSpec, ID: r.ID, Token: r.Token, Key: r.Key, Gate: e.Gate, mesh: e.Holder}
	if !ok || !i.owns(e) {
		return nil, &Lost{Why: "somebody ended it (`culvert recover` or `clean`) while this machine was away"}
	}
	i.spec.Namespace, i.spec.Holder = r.Namespace, e.Holder
	if e.Kind == intercept.Mesh {
		i.spec.Holder = e.Members[memberOf(e, r.Holder.Session)].Holder
	}
	if r.TLSSecret != "" {
		key, err := c.tlsKey(ctx, r.Namespace, r.TLSSecret)
		if err != nil {
			return nil, lostIfRefused("the key is not to be had any more", err)
		}
		i.tls = &key
		c.keys.set(r.Namespace, r.Key, key)
	}
	switch {
	case e.Mode != "":
		if err := c.resumeRuleHead(ctx, i, e, r); err != nil {
			return nil, err
		}
	case e.Kind == intercept.Exchange, e.Kind == intercept.Mesh:
		service, err := c.client.Services(r.Namespace).Get(ctx, r.Key, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil, &Lost{Why: "the Service was deleted"}
		}
		if err != nil {
			return nil, translate("looking at Service "+r.Key, err)
		}
		record, err := RecordOf(service)
		if err != nil {
			return nil, err
		}
		if record == nil || record.Session != i.owner().Session {
			return nil, &Lost{Why: "the Service is not intercepted by this session any more"}
		}
		plan, err := c.plan(ctx, service, nil, r.Expose, r.Force)
		if err != nil {
			return nil, lostIfRefused("the Service is not as it was", err)
		}
		i.head = &exchangeHead{c: c, plan: plan, again: plan.reapplied()}
	case e.Kind == intercept.Preview:
		i.head = &previewHead{c: c, spec: &i.spec, list: portsOfEntry(e)}
	case e.Kind == intercept.Scale:
		if i.head, err = c.resumeScaleHead(ctx, r.Namespace, e); err != nil {
			return nil, err
		}
	}
	return i, nil
}

// portsOfEntry are the ports of an entry, as far as it tells them.
func portsOfEntry(e intercept.Entry) []PlanPort {
	var ports []PlanPort
	for _, r := range e.Routes {
		p := PlanPort{Name: r.Name, Protocol: protocolNamed(r.Protocol), Port: r.Port, Number: int32(r.Listen)}
		if r.Machine != nil {
			p.Local = r.Machine.Local
		}
		ports = append(ports, p)
	}
	return ports
}

func protocolNamed(p string) corev1.Protocol { return protocol(corev1.Protocol(p)) }

// Keep watches over an intercept that was started, until ctx ends (nil), it is
// lost (*Lost), or something else broke (then it may be called again). With
// onConflict api.OnConflictLeave somebody's change of the Service ends it. note is
// told what happened.
func (i *Intercept) Keep(ctx context.Context, onConflict string, note func(string)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	settled := make(chan struct{})
	go func() {
		defer close(settled)
		for ctx.Err() == nil {
			err := i.settle(ctx)
			if err == nil {
				return
			}
			if ctx.Err() == nil {
				note("the origin's address is not in use yet: " + err.Error())
			}
			select {
			case <-time.After(lookEvery):
			case <-ctx.Done():
			}
		}
	}()
	defer func() { cancel(); <-settled }()
	ended := make(chan error, 3)
	go func() { ended <- i.keepGates(ctx, note) }()
	go func() { ended <- i.look(ctx, note) }()
	waiting := 2
	switch h := i.head.(type) {
	case *exchangeHead:
		waiting++
		go func() { ended <- h.watch(ctx, i, onConflict, note) }()
	case *ruleHead:
		if h.router != nil {
			waiting++
			go func() { ended <- h.keepRule(ctx, i, onConflict, note) }()
		}
	}
	var first error
	for range waiting {
		if err := <-ended; first == nil {
			first = err
		}
		cancel()
	}
	if errors.Is(first, context.Canceled) {
		return nil
	}
	return first
}

// lookEvery is how often it is looked whether an intercept is still what it was.
const lookEvery = 15 * time.Second

// look finds from time to time that somebody ended the intercept, where no watch
// tells, or began to end it and did not get far: then it goes on.
func (i *Intercept) look(ctx context.Context, note func(string)) error {
	draining := false
	for {
		select {
		case <-time.After(lookEvery):
		case <-ctx.Done():
			return nil
		}
		state, err := i.c.GateState(ctx, i.spec.Namespace)
		if err != nil {
			continue // the API server is away, or somebody spoilt the state: it is looked again
		}
		e, ok := state.Entries[i.Key]
		if ok && !i.owns(e) {
			return i.lostTo(e)
		}
		switch led, err := i.head.led(ctx, i); {
		case err != nil:
			continue
		case !led:
			return &Lost{Why: "somebody ended it (`culvert recover` or `clean`)"}
		case !ok || e.Draining && draining:
			note("somebody began to end it and did not get to the end: it goes on")
			if err := i.remake(ctx, true); err != nil {
				return err
			}
		}
		draining = ok && e.Draining
	}
}

// keepGates keeps the gates informed, and makes them anew when they are gone.
func (i *Intercept) keepGates(ctx context.Context, note func(string)) error {
	for {
		following, cancel := context.WithCancel(ctx)
		gone := make(chan string, 1)
		ended := make(chan error, 1)
		go func() {
			ended <- i.c.KeepGates(following, i.spec.Namespace, i.Gate, func(what string) {
				select {
				case gone <- what:
				default:
				}
			})
		}()
		select {
		case err := <-ended:
			cancel()
			return err
		case what := <-gone:
			cancel()
			<-ended
			note(what + " of the gates was deleted by somebody: made anew")
		}
		if err := i.remake(ctx, false); err != nil {
			return err
		}
	}
}

// remake makes the gates anew, as long as traffic is led to them; again: though
// somebody had begun to end it.
func (i *Intercept) remake(ctx context.Context, again bool) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch led, err := i.head.led(ctx, i); {
	case err != nil:
		return err
	case !led:
		return &Lost{Why: "somebody ended it (`culvert recover` or `clean`)"}
	}
	if err := i.renew(ctx); err != nil {
		return err
	}
	origins, err := i.head.origin(ctx, i.owner().Session)
	if err != nil {
		return err
	}
	state, err := i.c.ChangeGateState(ctx, i.spec.Namespace, func(s *intercept.State) error {
		if e, ok := s.Entries[i.Key]; ok && e.Holder.Session != i.owner().Session {
			return i.lostTo(e)
		}
		if e, ok := s.Entries[i.Key]; ok && again {
			e.Draining, e.Over = false, false
			s.Entries[i.Key] = e
		}
		return i.fill(s, origins, nil)
	})
	if err != nil {
		return err
	}
	gates := GateSpec{Agent: i.spec.Gates, Name: i.Gate}
	i.head.gates(&gates)
	if err := i.c.EnsureGates(ctx, i.spec.Namespace, gates, func(string) {}); err != nil {
		return err
	}
	if err := i.c.Push(ctx, i.spec.Namespace, i.Gate, state); err != nil {
		return err
	}
	return i.head.lead(ctx, i, state.Entries[i.Key].Routes) // their ports may be others
}

// watch follows the Service.
func (h *exchangeHead) watch(ctx context.Context, i *Intercept, onConflict string, note func(string)) error {
	for {
		service, err := h.c.client.Services(i.spec.Namespace).Get(ctx, i.Key, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return &Lost{Why: "the Service was deleted"}
		}
		if err != nil {
			return translate("looking at Service "+i.Key, err)
		}
		held, err := RecordOf(service)
		if err != nil {
			return err
		}
		if held == nil {
			held = &Record{Session: i.owner().Session} // replaced as a whole: WatchService sees what it is now
		}
		var change *ServiceChange
		following, cancel := context.WithCancel(ctx)
		err = h.c.WatchService(following, i.spec.Namespace, i.Key, *held, func(ch ServiceChange) {
			if change == nil {
				change = &ch
				cancel()
			}
		})
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil
		case change == nil:
			return err
		}
		if err := h.changed(ctx, i, *change, onConflict, note); err != nil {
			return err
		}
	}
}

// changed reacts to somebody's change of the Service.
func (h *exchangeHead) changed(ctx context.Context, i *Intercept, ch ServiceChange, onConflict string, note func(string)) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	who := firstOf(ch.Manager, "somebody")
	switch ch.Kind {
	case Deleted:
		return &Lost{Why: "the Service was deleted"}
	case Taken:
		return &Lost{Why: "another session has it now"}
	case Released:
		state, err := h.c.GateState(ctx, i.spec.Namespace)
		if err != nil {
			return err
		}
		if e, ok := state.Entries[i.Key]; !ok || e.Draining || !i.owns(e) {
			return &Lost{Why: "somebody ended it (`culvert recover` or `clean`)"}
		}
	}
	if onConflict == api.OnConflictLeave {
		return &Lost{Why: fmt.Sprintf("%s changed the Service, and theirs stays (--on-conflict leave)", who)}
	}
	if i.spec.Kind == intercept.Mesh {
		// Every member has seen it, and one is enough.
		service, put, err := h.awaitAnother(ctx, i)
		if err != nil {
			return err
		}
		if put {
			return h.renew(ctx, service)
		}
		ch.Service = service
		r, err := RecordOf(service)
		if err != nil {
			return err
		}
		if r != nil { // else the last one that was seen holds
			h.plan.Record = r
		}
	}
	again, ok := reapplies(h.plan.reapplied()).add(h.c.Now())
	if !ok {
		return &Lost{Why: fmt.Sprintf("%s changed the Service again, after %d times within %v, and theirs stays", who, maxReapplies, reapplyWindow)}
	}
	note(fmt.Sprintf("%s changed the Service: exchanged again, on top of that", who))
	plan, err := h.c.Replan(ctx, h.plan, ch.Service)
	if err != nil {
		return lostIfRefused(who+" changed the Service", err)
	}
	h.plan, h.again = plan, again
	return i.reapply(ctx)
}

// lostIfRefused makes a Lost of what planning says of a Service that cannot be
// exchanged as it is now; anything else passes.
func lostIfRefused(why string, err error) error {
	var e *api.Error
	if errors.As(err, &e) {
		switch e.Code {
		case api.CodeUsage, api.CodeNotFound, api.CodeConflict, api.CodeDenied, api.CodeUnsupported:
			return &Lost{Why: why + ": " + e.Message}
		}
	}
	return err
}

// fill enters an intercept with the addresses of its origin. Without backends those
// stay that were there.
func (i *Intercept) fill(s *intercept.State, origins map[PortKey]string, backends map[PortKey][]string) error {
	if err := i.enter(s); err != nil {
		return err
	}
	e := s.Entries[i.Key]
	for k := range e.Routes {
		r := &e.Routes[k]
		at := PortKey{Port: r.Port, Protocol: protocolNamed(r.Protocol)}
		r.Origin = origins[at]
		if backends != nil {
			r.Backends = backends[at]
		}
	}
	return nil
}

// reapply leads the Service to the gates again, as it is planned now.
func (i *Intercept) reapply(ctx context.Context) error {
	origins, err := i.head.origin(ctx, i.owner().Session)
	if err != nil {
		return err
	}
	state, err := i.c.ChangeGateState(ctx, i.spec.Namespace, func(s *intercept.State) error { return i.fill(s, origins, nil) })
	if err != nil {
		return err
	}
	routes := state.Entries[i.Key].Routes
	if _, err := i.head.policies(ctx, i, routes); err != nil {
		return err
	}
	if err := i.c.Push(ctx, i.spec.Namespace, i.Gate, state); err != nil {
		return err
	}
	return i.head.lead(ctx, i, routes)
}
