package cluster

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// ServiceState is a Service, or a workload whose pods are replaced, and who has
// its traffic. JSON of `culvert list`.
type ServiceState struct {
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"` // of a workload KIND/NAME
	Type      string    `json:"type,omitempty"`
	Ports     []string  `json:"ports,omitempty"` // "80/TCP", with " -> alice:8080" where it is exposed
	Kind      string    `json:"kind,omitempty"`  // intercept.Exchange, ...; empty: nobody intercepts it
	Mode      string    `json:"mode,omitempty"`  // of an exchange: "selector" or "scale"; of a mesh: "router", "istio", ...
	User      string    `json:"user,omitempty"`
	Session   string    `json:"session,omitempty"`
	Since     time.Time `json:"since,omitzero"`
	// Alive: the owner's session was seen within the last minute.
	Alive    bool      `json:"alive"`
	LastSeen time.Time `json:"lastSeen,omitzero"` // by the API server's clock; zero: there is no heartbeat
	State    string    `json:"state,omitempty"`   // "active", "gone", "starting", "draining", "restored"
	// Members are those of a mesh; User is then empty, and Alive that one of them is.
	Members []MemberState `json:"members,omitempty"`
}

// MemberState is one developer of a meshed Service. JSON of `culvert list`.
type MemberState struct {
	User     string    `json:"user,omitempty"`
	Session  string    `json:"session"`
	Mode     string    `json:"mode"` // "router", "istio", ...
	Since    time.Time `json:"since,omitzero"`
	Match    []string  `json:"match"` // conditions, as they are typed
	Ports    []string  `json:"ports"` // "80/TCP -> alice:8080"
	Alive    bool      `json:"alive"`
	LastSeen time.Time `json:"lastSeen,omitzero"` // as in ServiceState
}

// membersOf shows the members of an entry.
func membersOf(e intercept.Entry) []MemberState {
	var all []MemberState
	for _, m := range e.Members {
		one := MemberState{User: m.Holder.User, Session: m.Holder.Session, Since: m.Holder.Since, Mode: firstOf(e.Mode, api.ModeRouter)}
		for _, c := range m.Match {
			one.Match = append(one.Match, c.String())
		}
		for _, p := range m.Ports {
			one.Ports = append(one.Ports, fmt.Sprintf("%d/TCP -> %s:%d", p.Port, firstOf(m.Holder.User, "machine"), p.Machine.Local))
		}
		all = append(all, one)
	}
	return all
}

// addMembersSeen adds when the members' sessions were seen.
func (c *Cluster) addMembersSeen(ctx context.Context, namespace string, all []MemberState) error {
	for k := range all {
		last, _, err := c.SeenSession(ctx, namespace, all[k].Session)
		if err != nil {
			return err
		}
		all[k].LastSeen, all[k].Alive = last, !last.IsZero() && c.Now().Sub(last) < aliveWithin
	}
	return nil
}

// aliveWithin is three heartbeats.
const aliveWithin = 3 * HeartbeatEvery

// List shows every Service of a namespace but culvert's own.
func (c *Cluster) List(ctx context.Context, namespace string) ([]ServiceState, error) {
	state, err := c.GateState(ctx, namespace)
	if err != nil {
		return nil, err
	}
	var all []ServiceState
	options := metav1.ListOptions{Limit: pageSize}
	shown := map[string]bool{}
	for {
		page, err := c.client.Services(namespace).List(ctx, options)
		if err != nil {
			return nil, translate(fmt.Sprintf("listing Services of namespace %q", namespace), err)
		}
		for k := range page.Items {
			s := &page.Items[k]
			preview := isPreview(s)
			if s.Labels[LabelManagedBy] == "culvert" && !preview {
				continue // an origin
			}
			one := ServiceState{Namespace: namespace, Name: s.Name, Type: string(s.Spec.Type)}
			if s.Spec.ClusterIP == corev1.ClusterIPNone {
				one.Type = "Headless"
			}
			entry, known := state.Entries[s.Name]
			record, err := RecordOf(s)
			if preview {
				record = new(Record)
				err = json.Unmarshal([]byte(s.Annotations[AnnotationPreview]), record)
			}
			switch {
			case err != nil:
				one.Kind, one.State = intercept.Exchange, "not readable: "+err.Error()
			case record != nil:
				one.Kind, one.User, one.Session, one.Since = firstOf(record.Kind, entry.Kind, intercept.Exchange), record.User, record.Session, record.Since
				one.State = "active"
				if record.Phase == PhaseRestored {
					one.State = "restored"
				}
			case known:
				one.Kind, one.User, one.Session, one.Since = entry.Kind, entry.Holder.User, entry.Holder.Session, entry.Holder.Since
				one.State = "starting"
				if entry.Draining {
					one.State = "draining"
				}
			}
			for _, p := range s.Spec.Ports {
				one.Ports = append(one.Ports, portText(p.Port, string(protocol(p.Protocol)), one.User, entry))
			}
			if one.Kind == intercept.Exchange {
				one.Mode = api.ModeSelector
			}
			if one.Kind == intercept.Mesh {
				one.Mode, one.Members = api.ModeRouter, membersOf(entry)
			}
			for _, key := range rulesFor(state, s.Name) {
				shown[key] = true
				one.addRule(state.Entries[key])
			}
			shown[s.Name] = true
			all = append(all, one)
		}
		if options.Continue = page.Continue; options.Continue == "" {
			break
		}
	}
	for key, e := range state.Entries {
		if shown[key] {
			continue
		}
		kind, mode := e.Kind, ""
		if kind == intercept.Scale {
			kind, mode = intercept.Exchange, api.ModeScale
		}
		one := ServiceState{Namespace: namespace, Name: e.Service, Kind: kind, Mode: mode, User: e.Holder.User, Session: e.Holder.Session, Since: e.Holder.Since, State: "active"}
		for _, r := range e.Routes {
			one.Ports = append(one.Ports, portText(r.Port, r.Protocol, e.Holder.User, e))
		}
		if e.Kind == intercept.Mesh {
			one.Members = membersOf(e)
		}
		all = append(all, one)
	}
	if err := c.addSeen(ctx, namespace, all); err != nil {
		return nil, err
	}
	slices.SortFunc(all, func(a, b ServiceState) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

// rulesFor are the keys of the entries that mesh a Service by rules, in their order.
func rulesFor(state *intercept.State, service string) []string {
	var keys []string
	for key, e := range state.Entries {
		if e.Service == service && e.Mode != "" {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// addRule adds the member of a mesh by a rule. Who exchanges the Service has the rest.
func (s *ServiceState) addRule(e intercept.Entry) {
	if s.Kind == "" {
		s.Kind, s.State = intercept.Mesh, "active"
	}
	switch {
	case s.Kind != intercept.Mesh:
	case s.Mode == "":
		s.Mode = e.Mode
	case !slices.Contains(strings.Split(s.Mode, ","), e.Mode):
		s.Mode += "," + e.Mode
	}
	s.Members = append(s.Members, membersOf(e)...)
}

// addSeen adds when the owners' sessions were seen.
func (c *Cluster) addSeen(ctx context.Context, namespace string, all []ServiceState) error {
	known := map[string]time.Time{}
	for k := range all {
		one := &all[k]
		if err := c.addMembersSeen(ctx, namespace, one.Members); err != nil {
			return err
		}
		if one.Kind == intercept.Mesh {
			for _, m := range one.Members {
				one.Alive = one.Alive || m.Alive
				if m.LastSeen.After(one.LastSeen) {
					one.LastSeen = m.LastSeen
				}
			}
			if !one.Alive && one.State == "active" {
				one.State = "gone"
			}
			continue
		}
		if one.Session == "" {
			continue
		}
		last, asked := known[one.Session]
		if !asked {
			var err error
			if last, _, err = c.SeenSession(ctx, namespace, one.Session); err != nil {
				return err
			}
			known[one.Session] = last
		}
		one.LastSeen = last
		one.Alive = !last.IsZero() && c.Now().Sub(last) < aliveWithin
		if !one.Alive && one.State == "active" {
			one.State = "gone"
		}
	}
	return nil
}

func portText(port int32, proto, user string, e intercept.Entry) string {
	text := fmt.Sprintf("%d/%s", port, proto)
	for _, r := range e.Routes {
		if r.Port == port && r.Protocol == proto && r.Machine != nil {
			text += fmt.Sprintf(" -> %s:%d", firstOf(user, "machine"), r.Machine.Local)
		}
	}
	return text
}

func hostPortOf(host string, port int32) string {
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}
