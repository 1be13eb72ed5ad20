package cluster

import (
	"context"
	"errors"
	"net/netip"
	"regexp"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Addresses of RFC 5737 and RFC 3849, for documentation: in no Service range.
const (
	impossible4 = "192.0.2.1"
	impossible6 = "2001:db8::1"
)

// probeServiceRange asks for a Service with an impossible address, as a dry
// run, once per family: the server refuses and names the range (since 1.6, also
// with ServiceCIDR objects). Nothing is created. The error says why nothing was
// learnt.
func (c *Cluster) probeServiceRange(ctx context.Context) ([]netip.Prefix, error) {
	var found []netip.Prefix
	var errs []error
	for _, probe := range []struct {
		family corev1.IPFamily
		ip     string
	}{{corev1.IPv4Protocol, impossible4}, {corev1.IPv6Protocol, impossible6}} {
		_, err := c.client.Services(c.namespace).Create(ctx, &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{
				GenerateName: "culvert-probe-",
				Labels:       map[string]string{LabelManagedBy: "culvert"},
			},
			Spec: corev1.ServiceSpec{
				ClusterIP:  probe.ip,
				IPFamilies: []corev1.IPFamily{probe.family},
				Ports:      []corev1.ServicePort{{Port: 1}},
			},
		}, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if err == nil {
			continue
		}
		ranges := parseServiceRanges(err.Error())
		if len(ranges) == 0 {
			errs = append(errs, err)
		}
		for _, p := range ranges {
			if !slices.Contains(found, p) {
				found = append(found, p)
			}
		}
	}
	if len(found) > 0 {
		return found, nil // the other family is not configured
	}
	return nil, errors.Join(errs...)
}

// A CIDR anywhere in the text: the sentence around it changed over the
// versions ("The range of valid IPs is 10.96.0.0/16").
var cidrPattern = regexp.MustCompile(`[0-9a-fA-F:.]*[0-9a-fA-F:]/\d{1,3}`)

var aboutServiceIPs = regexp.MustCompile(`clusterIPs?|valid IPs|valid range`)

// parseServiceRanges finds the Service ranges in an API server's refusal. Only a
// message about cluster IPs counts: other messages may hold other CIDRs.
func parseServiceRanges(message string) []netip.Prefix {
	if !aboutServiceIPs.MatchString(message) {
		return nil
	}
	var found []netip.Prefix
	for _, text := range cidrPattern.FindAllString(message, -1) {
		p, err := netip.ParsePrefix(text)
		if err != nil || p.Bits() == 0 || slices.Contains(found, p.Masked()) {
			continue
		}
		found = append(found, p.Masked())
	}
	return found
}
