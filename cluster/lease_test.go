package cluster

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
)

// The machine's own clock may be anywhere.
func TestClockIsTheServers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var k clock
		if d := time.Since(k.now()).Abs(); d > time.Second {
			t.Errorf("%v before the first answer", d)
		}
		theirs := time.Date(2031, 2, 3, 4, 5, 6, 0, time.UTC)
		k.note(theirs.Format(http.TimeFormat))
		time.Sleep(90 * time.Second)
		for _, bad := range []string{"", "yesterday"} {
			k.note(bad)
		}
		if got := k.now(); !got.Equal(theirs.Add(90 * time.Second)) {
			t.Errorf("%v", got)
		}
		k.note(theirs.Format(http.TimeFormat)) // it was set back
		if got := k.now(); !got.Equal(theirs) {
			t.Errorf("%v", got)
		}
	})
}

func TestLeaseHasTheServersTime(t *testing.T) {
	server, c := newFleetAPI(t)
	theirs := time.Date(2031, 2, 3, 4, 5, 6, 0, time.UTC)
	server.date = theirs
	owner := &metav1.OwnerReference{APIVersion: "apps/v1", Kind: "Deployment", Name: "culvert-agent-s1", UID: "u1"}
	if _, ok, err := c.SeenSession(t.Context(), "demo", "s1"); ok || err != nil {
		t.Errorf("%v, %v", ok, err)
	}
	for i := range 2 {
		if err := c.Heartbeat(t.Context(), "demo", "s1", "dev", "o1", owner); err != nil {
			t.Fatal(err)
		}
		last, ok, err := c.SeenSession(t.Context(), "demo", "s1")
		if d := last.Sub(server.date); err != nil || !ok || d < 0 || d > 5*time.Second {
			t.Errorf("%d: %v, %v, %v", i, last, ok, err)
		}
		server.date = theirs.Add(time.Hour)
	}
	l, err := c.client.Leases("demo").Get(t.Context(), "culvert-s1", metav1.GetOptions{})
	if err != nil || l.Labels[LabelSession] != "s1" || l.Annotations[AnnotationUser] != "dev" || l.Annotations[AnnotationOrigin] != "o1" ||
		len(l.OwnerReferences) != 1 || l.Spec.AcquireTime.Sub(theirs) > 5*time.Second {
		t.Errorf("%+v, %v", l, err)
	}
	for range 2 {
		if err := c.DeleteLease(t.Context(), "demo", "s1"); err != nil {
			t.Error(err)
		}
	}
	if _, ok, err := c.SeenSession(t.Context(), "demo", "s1"); ok || err != nil {
		t.Errorf("%v, %v", ok, err)
	}
}

func TestLeaseErrors(t *testing.T) {
	server, c := newFleetAPI(t)
	server.put(&coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: "culvert-s1", Namespace: "demo"}})
	var e *api.Error
	if err := c.Heartbeat(t.Context(), "demo", "s1", "", "", nil); !errors.As(err, &e) || e.Code != api.CodeExists {
		t.Errorf("somebody else's: %v", err)
	}
	server.denied = []string{"create leases"}
	if err := c.Heartbeat(t.Context(), "demo", "s2", "", "", nil); !errors.As(err, &e) || e.Code != api.CodeForbidden || !strings.Contains(e.Message, "leases") {
		t.Errorf("forbidden: %v", err)
	}
}
