package cluster

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	applies = metav1.ManagedFieldsOperationApply
	updates = metav1.ManagedFieldsOperationUpdate

	selectorAndPort = `{"f:spec":{"f:ports":{"k:{\"port\":80,\"protocol\":\"TCP\"}":{"f:targetPort":{}}},"f:selector":{}}}`
	onlySelector    = `{"f:spec":{"f:selector":{}}}`
	onlyPort        = `{"f:spec":{"f:ports":{"k:{\"port\":80,\"protocol\":\"TCP\"}":{"f:targetPort":{}}}}}`
	allFields       = `{"f:metadata":{"f:labels":{"f:team":{}}},"f:spec":{"f:ports":{"k:{\"port\":80,\"protocol\":\"TCP\"}":{".":{},"f:name":{},"f:port":{},"f:targetPort":{}}},"f:selector":{}}}`
	otherFields     = `{"f:metadata":{"f:labels":{"f:team":{}}},"f:spec":{"f:ports":{"k:{\"port\":80,\"protocol\":\"TCP\"}":{".":{},"f:name":{},"f:port":{}}}}}`
	ourFields       = `{"f:metadata":{"f:annotations":{".":{},"f:culvert.dev/intercept":{}}},"f:spec":{"f:ports":{"k:{\"port\":80,\"protocol\":\"TCP\"}":{"f:targetPort":{}}},"f:selector":{}}}`
)

type entries = []metav1.ManagedFieldsEntry

func TestServiceOwners(t *testing.T) {
	for _, test := range []struct {
		name              string
		live, saved, want entries
	}{
		{"before the switch", entries{entry("argocd", applies, allFields)}, nil, entries{entry("argocd", applies, selectorAndPort)}},
		{"of other fields", entries{entry("argocd", applies, otherFields)}, nil, nil},
		{"two share it", entries{entry("argocd", applies, allFields), entry("canary", applies, onlySelector)}, nil,
			entries{entry("argocd", applies, selectorAndPort), entry("canary", applies, onlySelector)}},
		{"switched", entries{entry("argocd", applies, otherFields), entry("culvert", updates, ourFields)}, entries{entry("argocd", applies, selectorAndPort)},
			entries{entry("argocd", applies, selectorAndPort)}},
		{"the selector taken meanwhile", entries{entry("argocd", applies, otherFields), entry("culvert", updates, onlyPort), entry("helm", updates, onlySelector)},
			entries{entry("argocd", applies, selectorAndPort)}, entries{entry("helm", updates, onlySelector), entry("argocd", applies, onlyPort)}},
		{"nothing is ours", entries{entry("argocd", applies, otherFields)}, entries{entry("argocd", applies, selectorAndPort)}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := owners(test.live, test.saved)
			sameEntries(t, got, test.want, err)
		})
	}
}

func TestServiceGiveBack(t *testing.T) {
	early, late := metav1.NewTime(time.Unix(1000, 0)), metav1.NewTime(time.Unix(2000, 0))
	at := func(e metav1.ManagedFieldsEntry, when metav1.Time) metav1.ManagedFieldsEntry {
		e.Time = &when
		return e
	}
	status := entry("argocd", applies, `{"f:status":{"f:loadBalancer":{}}}`)
	status.Subresource = "status"
	for _, test := range []struct {
		name              string
		live, saved, want entries
	}{
		{"beside what it owns", entries{at(entry("argocd", applies, otherFields), late), entry("culvert", updates, ourFields)}, entries{at(entry("argocd", applies, selectorAndPort), early)},
			entries{at(entry("argocd", applies, allFields), late)}},
		{"to one that owned no more", entries{entry("culvert", updates, ourFields)}, entries{at(entry("kubectl", updates, onlySelector), early)},
			entries{at(entry("kubectl", updates, onlySelector), early)}},
		{"not what was taken meanwhile", entries{entry("culvert", updates, onlyPort), entry("helm", updates, onlySelector)}, entries{entry("argocd", applies, selectorAndPort)},
			entries{entry("helm", updates, onlySelector), entry("argocd", applies, onlyPort)}},
		{"operation and subresource tell apart", entries{status, entry("argocd", updates, otherFields), entry("culvert", updates, ourFields)}, entries{entry("argocd", applies, onlySelector)},
			entries{status, entry("argocd", updates, otherFields), entry("argocd", applies, onlySelector)}},
		{"nobody", entries{entry("culvert", updates, ourFields)}, nil, entries{{}}},
		{"nobody at all", nil, nil, entries{{}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			before, _ := json.Marshal(test.live)
			got, err := giveBack(test.live, test.saved)
			sameEntries(t, got, test.want, err)
			if after, _ := json.Marshal(test.live); string(before) != string(after) {
				t.Error("the live entries were changed")
			}
		})
	}
	if _, err := giveBack(entries{entry("x", updates, `{`), entry("culvert", updates, `{"f:`)}, nil); err == nil {
		t.Error("fields that cannot be read are read")
	}
}

func sameEntries(t *testing.T, got, want entries, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	var a, b any
	for v, es := range map[*any]entries{&a: got, &b: want} {
		text, _ := json.Marshal(es)
		if err := json.Unmarshal(text, v); err != nil {
			t.Fatal(err)
		}
	}
	if !reflect.DeepEqual(a, b) {
		t.Errorf("got  %v\nwant %v", a, b)
	}
}

func TestServiceChangedBy(t *testing.T) {
	at := func(e metav1.ManagedFieldsEntry, seconds int64) metav1.ManagedFieldsEntry {
		when := metav1.NewTime(time.Unix(seconds, 0))
		e.Time = &when
		return e
	}
	o := &metav1.ObjectMeta{ManagedFields: entries{
		at(entry("old", updates, onlySelector), 1), at(entry("new", updates, onlySelector), 3), at(entry("ports", updates, onlyPort), 4), at(entry("culvert", updates, ourFields), 5),
		at(entry("other", updates, `{"f:spec":{"f:type":{}}}`), 6),
	}}
	if got := changedBy(o, isSelector); got != "new" {
		t.Errorf("the selector by %q", got)
	}
	if got := changedBy(o, isPort); got != "ports" {
		t.Errorf("the ports by %q", got)
	}
	if got := changedBy(&metav1.ObjectMeta{}, isPort); got != "" {
		t.Errorf("nobody is %q", got)
	}
}
